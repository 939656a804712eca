"""What the package ships beside its code: the pico model and the text it is shown on."""
