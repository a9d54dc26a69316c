"""Training in more than one process: who is there, who holds what, what goes over the wire."""
