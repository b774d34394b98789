// What a plan takes for granted of a model's Python objects, looked at without a step of the interpreter: thousands of
// looks before each forward. The caller holds the interpreter's lock and keeps all these objects alive.
#pragma once

#include <cstdint>
#include <cstring>

extern "C" {

// What this needs of Python's stable interface, as this process has it: PyDict_Next, PyDict_GetItemWithError, PyDict_Size,
// PyObject_Type and Py_DecRef.
struct Python {
  int (*next)(void* dict, intptr_t* at, void** key, void** value);
  void* (*item)(void* dict, void* key);
  intptr_t (*size)(void* dict);
  void* (*type)(void* object);
  void (*release)(void* object);
};

// Dictionaries with their values in order, others with their sizes, and some with one key each and its value; objects
// and their classes.
struct Objects {
  Python python;
  void *const *tables, *const *values, *const *sized, *const *named, *const *keys, *const *found, *const *objects;
  void* const* classes;
  const int64_t* sizes;
  int32_t table_count, value_count, sized_count, named_count, object_count;
};

}

namespace {

// A dictionary, and where its keys are: a hint that may be wrong, for looks that would each wait for memory.
inline void fetch(void* const* dicts, int count) {
  for (int i = 0; i < count; ++i) __builtin_prefetch(dicts[i]);
  for (int i = 0; i < count; ++i) {
    void* keys;
    memcpy(&keys, static_cast<const char*>(dicts[i]) + 4 * sizeof(void*), sizeof(keys));
    __builtin_prefetch(keys);
    __builtin_prefetch(static_cast<const char*>(keys) + 64);
  }
}

inline bool unchanged(const Objects& o) {
  fetch(o.tables, o.table_count), fetch(o.named, o.named_count);
  for (int i = 0; i < o.sized_count; ++i) __builtin_prefetch(o.sized[i]);
  for (int i = 0; i < o.object_count; ++i) __builtin_prefetch(o.objects[i]);
  int seen = 0;
  for (int i = 0; i < o.table_count; ++i) {
    intptr_t at = 0;
    for (void *key, *value; o.python.next(o.tables[i], &at, &key, &value); ++seen)
      if (seen == o.value_count || value != o.values[seen]) return false;
  }
  if (seen != o.value_count) return false;
  for (int i = 0; i < o.sized_count; ++i)
    if (o.python.size(o.sized[i]) != o.sizes[i]) return false;
  for (int i = 0; i < o.named_count; ++i)
    if (o.python.item(o.named[i], o.keys[i]) != o.found[i]) return false;
  for (int i = 0; i < o.object_count; ++i) {
    void* type = o.python.type(o.objects[i]);
    o.python.release(type);
    if (type != o.classes[i]) return false;
  }
  return true;
}

}  // namespace
