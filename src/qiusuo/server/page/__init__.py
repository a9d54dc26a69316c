"""What the web page asks for, below /api: conversations, runs, keys, prices, the engines' state."""
