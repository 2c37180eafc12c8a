"""What training minimises: matching, losses, denoising. Knows arrays, never the model."""
