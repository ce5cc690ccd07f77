"""What fidelity.py fine-tunes, on what: the tasks and their corpora."""
