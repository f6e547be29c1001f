"""Tokens from q* of two language models."""
