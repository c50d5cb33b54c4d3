"""The packages that are installed: whether they are whole, and how those are imported that need a hand."""
