"""
The stores that come with callbackq, each in a module of its own.

`callbackq` itself imports both: they need nothing but Python's own library. A store that needs a driver of its own
must be imported from its module only, so that nobody loads the driver unasked.
"""
