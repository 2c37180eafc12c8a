"""The program that trains, `python -m train RECIPE`, run from a checkout. It builds on the library alone."""
