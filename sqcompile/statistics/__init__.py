"""calibrate: what the captured graph sees of real data, in bounded memory."""
