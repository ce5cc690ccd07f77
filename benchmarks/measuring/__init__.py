"""What train.py measures: steps of a model, every method beside stock, and the largest that fits."""
