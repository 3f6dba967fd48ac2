"""Speculative decoding: who drafts tokens, how a step verifies them, and who decides how many are worth it."""
