extern "C" int native_sampler_version() { return 1; }
