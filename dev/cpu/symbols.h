// What the program's own symbol table knows. All of it is empty in a stripped program.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace cpu_device {

// The source name of the function at this address, without its parameters; "?" where the table has no such name.
std::string function_name(const void* address);

// A variable in each OS thread's own storage.
struct ThreadLocal {
    size_t offset, size;  // bytes; offset counts from thread_storage()
};

// All thread-local variables whose mangled name ends in this suffix.
std::vector<ThreadLocal> thread_locals(const std::string& suffix);

// Where the program's thread-local variables begin for the calling OS thread.
char* thread_storage();

}  // namespace cpu_device
