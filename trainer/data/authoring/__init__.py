"""Make shards of what people have: arrays, folders, rendered glyphs. Split and index them."""
