"""GGUF, llama.cpp's format: one file with config, tokenizer and weights.

file.py        a file to a checkpoint, and a checkpoint to a file
header.py      the bytes of metadata and of the table of tensors
weights.py     numbers in and out of the types that GGUF stores them as
config.py      metadata to a model's config; metadata.py the other way
tensors.py     tensors to Hugging Face's names and shapes; plan.py the other way
tokenizer.py   the vocabulary both ways, with the words of pretokenizers.py
limits.py      what llama.cpp cannot load, or would compute otherwise
"""
