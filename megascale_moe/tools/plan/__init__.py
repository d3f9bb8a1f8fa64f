"""`megascale plan`: what a search found, in words, tables, pictures and files."""
