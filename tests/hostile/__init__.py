"""A member of the cluster that lies: whatever it says, the others go on."""
