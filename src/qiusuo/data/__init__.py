"""Text to tokens to batches: the room that knows what a model reads.

    text        documents.py (the user's files), corpora.py (by name or path), split.py,
                deduplicate.py, catalogue.py + .toml, pull.py,
                package_index.py (what can be fetched), archives.py and
                poetry.py (reading what was fetched), builtin/ (always there)
    tokens      tokenizer.py, tokenizer_files.py, vocabularies.py (how ours are made),
                plain_text.py and template_guard.py (no text can forge a marker),
                chat_template.py + .jinja, fill_in_the_middle.py
    batches     shards.py, shard_writer.py (tokens on disk), loader.py (training), validation.py,
                batch.py, randomness.py
    all at once prepare.py

Every refusal is a `DataError` (errors.py); every file appears whole or not at all (atomic.py).
Nothing here imports another room, and nothing reaches the network but `pull`.
"""
