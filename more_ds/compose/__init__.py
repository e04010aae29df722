"""Finished LoRAs put together: read, checked, mixed by MoLE, weighed by LoraHub, merged."""
