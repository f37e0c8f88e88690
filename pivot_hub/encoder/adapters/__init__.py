"""Adapters: an encoder in the form that another library takes, one module each. The library is the user's."""
