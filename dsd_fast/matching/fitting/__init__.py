"""Few-shot adaptation of a matcher."""
