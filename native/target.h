// The rest of a file for one instruction set, in the words of either compiler. What comes from the
// standard library is included before, so that it stays code that runs on every processor.
#pragma once
#define TARGET_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TARGET_BEGIN(names) \
    TARGET_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define TARGET_END TARGET_PRAGMA(clang attribute pop)
#else
#define TARGET_BEGIN(names) TARGET_PRAGMA(GCC push_options) TARGET_PRAGMA(GCC target(names))
#define TARGET_END TARGET_PRAGMA(GCC pop_options)
#endif
