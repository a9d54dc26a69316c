"""The APIs that existing clients speak: DeepSeek's, OpenAI's and Anthropic's."""
