"""Bittern makes Transformers small and fast without losing what they know."""
