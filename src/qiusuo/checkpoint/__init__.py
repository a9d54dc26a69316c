"""How weights are stored and exchanged."""
