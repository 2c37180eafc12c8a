"""The program that converts checkpoints between the PyTorch world and this library, and verifies what it converted.

`python -m convert SOURCE DESTINATION`, from a checkout of the repository; `--help` says the rest.
"""
