"""One file per published experiment; installed as diffax.configs."""
