"""Pure: the bytes that each layer of a model needs, from its header and the options it runs with."""
