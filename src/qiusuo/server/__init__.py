"""The service: APIs, keys, an exact ledger, and the page."""
