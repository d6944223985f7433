"""Complete JSON configs, one file per run or stage; installed as `lumi.configs`."""
