"""
What the stores on SQL databases share: callbacks as rows, and what becomes of them within a transaction.

A store adds the statements of its database, its transactions, and how a callback is stored.
"""
