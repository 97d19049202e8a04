"""The stores that come with callbackq. Import each from its own module, so that no driver is loaded unasked."""
