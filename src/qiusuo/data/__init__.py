"""Text to tokens to batches: the room that knows what a model reads.

    text        documents.py (the user's files), corpora.py (by name or path), split.py,
                deduplicate.py, archives.py and poetry.py (reading what was fetched),
                builtin/ (always there)
    fetching    pull.py (catalogue.py + .toml, package_index.py), hub.py (hub_reference.py,
                hub_listing.py), download.py (the one downloader), digests.py, cache.py
    tokens      tokenizer.py, tokenizer_files.py, vocabularies.py (how ours are made),
                plain_text.py and template_guard.py (no text can forge a marker),
                chat_template.py + .jinja, fill_in_the_middle.py
    batches     shards.py, shard_writer.py (tokens on disk), loader.py (training), validation.py,
                batch.py, randomness.py
    all at once prepare.py

Every refusal is a `DataError` (errors.py); every file appears whole or not at all (atomic.py).
Nothing here imports another room, and nothing reaches the network but `pull`.
"""
