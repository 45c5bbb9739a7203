"""How good are a frozen encoder's features? The pieces of examples/evaluate.py."""
