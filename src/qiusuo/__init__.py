"""Qiusuo (求索): the whole DeepSeek recipe in one package."""
