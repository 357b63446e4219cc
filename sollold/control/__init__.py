"""Operations on the whole cluster: plan, load, drain, copy, admit, doctor; keys, events, history."""
