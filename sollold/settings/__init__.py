"""The settings: what there is, how it is read and written, and the folders of a daemon."""
