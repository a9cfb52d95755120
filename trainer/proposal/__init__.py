"""A first config for data of a user's own: what the data are, what suits them, and the text of it.

data_summary    reads the shards: sizes, classes, the kind of input, mean and standard deviation
settings        a pure function of that summary and of the machine: every key, with its reason
document        the settings as a commented TOML file
raw_data        which `referral shards` command makes shards of a folder, table, arrays or tars
"""
