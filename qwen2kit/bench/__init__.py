"""Speed of a loaded model beside what the device could do at best (`qwen2kit bench`)."""
