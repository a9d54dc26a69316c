"""How the heavy operations run: one function an operation, a plain reference beside each fast path."""
