"""From a trained adapter to the forms that others read: plain LoRAs, merged models, an adapter for inference."""
