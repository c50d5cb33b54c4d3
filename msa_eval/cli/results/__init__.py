"""Commands that make something of finished results, from their evidence alone."""
