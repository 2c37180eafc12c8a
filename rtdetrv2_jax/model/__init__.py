"""The network, one file a box of the paper's figure."""
