"""Make shards of what people have: arrays, folders, rendered glyphs; split and index them."""
