"""What a layout costs: every formula of memory and time, once, over columns of layouts."""
