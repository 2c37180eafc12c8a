"""A detector as one file for engines that are not JAX."""
