"""What commands do over the whole cluster: plan, load, unload, drain, copy, delete, doctor."""
