#include "symbols.h"

#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <cctype>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

namespace cpu_device {
namespace {

// Calls visit(symbol, name) for each entry of .symtab.
template <class Visit>
void for_each_symbol(Visit visit) {
    std::ifstream file("/proc/self/exe", std::ios::binary);
    const std::string image(std::istreambuf_iterator<char>(file), {});
    if (image.size() < sizeof(ElfW(Ehdr))) return;
    const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(image.data());
    const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(image.data() + header->e_shoff);
    for (int s = 0; s < header->e_shnum; s++) {
        if (sections[s].sh_type != SHT_SYMTAB) continue;
        const char* names = image.data() + sections[sections[s].sh_link].sh_offset;
        const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(image.data() + sections[s].sh_offset);
        for (size_t i = 0; i < sections[s].sh_size / sizeof *symbols; i++)
            visit(symbols[i], names + symbols[i].st_name);
    }
}

// The program is the first of the loaded objects.
dl_phdr_info program() {
    dl_phdr_info info = {};
    dl_iterate_phdr([](dl_phdr_info* first, size_t, void* out) { return *static_cast<dl_phdr_info*>(out) = *first, 1; },
                    &info);
    return info;
}

}  // namespace

std::string function_name(const void* address) {
    const auto value = reinterpret_cast<ElfW(Addr)>(address) - program().dlpi_addr;
    std::string mangled;
    for_each_symbol([&](const ElfW(Sym) & symbol, const char* name) {
        if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && symbol.st_value == value) mangled = name;
    });
    if (mangled.empty()) return "?";
    int status = 0;
    char* demangled = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
    std::string result = status == 0 ? demangled : mangled;
    free(demangled);
    // "void scale<float>(float*, int)" is shown as "scale<float>".
    if (result.ends_with(')')) {
        int depth = 0;
        size_t open = result.size();
        do {
            open--;
            depth += (result[open] == ')') - (result[open] == '(');
        } while (depth > 0 && open > 0);
        result.resize(open);
    }
    if (result.starts_with("void ")) result.erase(0, 5);
    return result;
}

std::vector<ThreadLocal> thread_locals(const std::string& suffix) {
    std::vector<ThreadLocal> result;
    for_each_symbol([&](const ElfW(Sym) & symbol, const char* name) {
        if (ELF64_ST_TYPE(symbol.st_info) != STT_TLS || symbol.st_shndx == SHN_UNDEF) return;
        // The linker numbers equal names of different scopes: E4tileB6shared_0.
        std::string base = name;
        while (!base.empty() && (isdigit((unsigned char)base.back()) || base.back() == '_')) base.pop_back();
        if (base.ends_with(suffix)) result.push_back({symbol.st_value, symbol.st_size});
    });
    return result;
}

char* thread_storage() { return static_cast<char*>(program().dlpi_tls_data); }

}  // namespace cpu_device
