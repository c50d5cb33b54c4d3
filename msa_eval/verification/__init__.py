"""Results checked without attacking anything again: replayed, and counted again."""
