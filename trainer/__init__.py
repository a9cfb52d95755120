"""Train and measure one network.  Owns torch.distributed, deepspeed and webdataset."""
