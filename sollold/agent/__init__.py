"""Floor 2: this machine's share: ledger and grants, child processes, the tunnel, llama.cpp set-up."""
