// Runs recorded calls of the CUDA launchers (shim_calls.py writes them) in an executable of their own, for sanitizers and mutants:
//   driver FILE [--mutant K] [--call I]... [--wrong NAME]
// Buffers are of exact size and in memory of their own. Outputs start as 0xFF, which is NaN, and are compared with the recorded ones.
// Prints what goes wrong and exits with 1; with --mutant -1 also the marks of each call that a mutant could change ("reached CALL K...").
#include <dlfcn.h>

#include <fstream>
#include <iostream>
#include <vector>

#include "cuda_shim.h"
#include "shim_mutant.h"

namespace {

// -fsanitize=address is not told of heap buffers beyond malloc's 16-byte alignment; torch and CUDA align more, which hides nothing.
struct Buffer {
  int64_t bytes = 0, type = 0;  // -1: not an output; else the type's number (csrc/cpu/dtype.h)
  std::vector<char> start, wanted;
  char* p = nullptr;
};
struct Link {
  int64_t at, buffer, offset;
};
struct Call {
  std::string label, launcher;
  int64_t limit;
  std::vector<char> args;
  std::vector<Link> links;
  std::vector<Buffer> buffers;
};

struct Reader {
  std::ifstream f;
  int64_t number() {
    int64_t n = 0;
    f.read((char*)&n, 8);
    if (!f) throw std::runtime_error("the file of calls ends too soon");
    return n;
  }
  std::vector<char> bytes() {
    std::vector<char> v((size_t)number());
    f.read(v.data(), std::streamsize(v.size()));
    return v;
  }
  std::string text() {
    const auto v = bytes();
    return {v.begin(), v.end()};
  }
};

std::vector<Call> read_calls(const char* path) {
  Reader in{std::ifstream(path, std::ios::binary)};
  std::vector<Call> calls(size_t(in.number()));
  for (Call& c : calls) {
    c.label = in.text(), c.launcher = in.text(), c.limit = in.number(), c.args = in.bytes();
    c.links.resize(size_t(in.number()));
    for (Link& l : c.links) l = {in.number(), in.number(), in.number()};
    c.buffers.resize(size_t(in.number()));
    for (Buffer& b : c.buffers) b.bytes = in.number(), b.type = in.number(), b.start = in.bytes(), b.wanted = in.bytes();
  }
  return calls;
}

double value(const char* p, int64_t type, int64_t i) {
  if (type == 0) return ((const float*)p)[i];
  const uint16_t x = ((const uint16_t*)p)[i];
  return type == 2 ? mcshim::b2f(x) : mcshim::h2f(x);
}
// Elements that differ by more than rounding could explain: ten times what the contract allows.
int64_t wrong(const Buffer& b) {
  if (b.type == 4) {
    int64_t bad = 0;
    for (int64_t i = 0; i < b.bytes / 8; i++) bad += ((const int64_t*)b.p)[i] != ((const int64_t*)b.wanted.data())[i];
    return bad;
  }
  const double tolerance = b.type == 0 ? 1e-3 : b.type == 2 ? 0.1 : 0.01;
  const int64_t n = b.bytes / (b.type == 0 ? 4 : 2);
  double largest = 0;
  for (int64_t i = 0; i < n; i++) {
    const double e = std::fabs(value(b.wanted.data(), b.type, i));
    if (std::isfinite(e)) largest = std::fmax(largest, e);
  }
  int64_t bad = 0;
  for (int64_t i = 0; i < n; i++) {
    const double a = value(b.p, b.type, i), e = value(b.wanted.data(), b.type, i);
    bad += !(a == e || (a != a && e != e) || std::fabs(a - e) <= tolerance * largest);
  }
  return bad;
}

// What went wrong; empty if nothing.
std::string run(Call& c) {
  auto* launcher = (int64_t(*)(const void*, void*))dlsym(RTLD_DEFAULT, c.launcher.c_str());
  if (!launcher) return "no such launcher";
  for (Buffer& b : c.buffers) {
    b.p = (char*)std::malloc(size_t(b.bytes));
    if (b.start.empty()) std::memset(b.p, 0xFF, size_t(b.bytes));
    else std::memcpy(b.p, b.start.data(), b.start.size());
  }
  for (const Link& l : c.links) *(char**)(c.args.data() + l.at) = c.buffers[size_t(l.buffer)].p + l.offset;
  mcshim::g_shared_limit = c.limit;
  std::string problem;
  try {
    if (launcher(c.args.data(), nullptr)) problem = "the launcher gave an error";
  } catch (const std::exception& e) {
    problem = std::string("refused: ") + e.what();
  }
  for (size_t i = 0; i < c.buffers.size() && problem.empty(); i++) {
    const Buffer& b = c.buffers[i];
    if (b.type < 0) {
      if (!b.start.empty() && std::memcmp(b.p, b.start.data(), b.start.size())) problem = "result: an input was written to";
    } else if (const int64_t n = wrong(b)) {
      problem = "result: buffer " + std::to_string(i) + ", " + std::to_string(n) + " elements";
    }
  }
  for (Buffer& b : c.buffers) std::free(b.p);
  return problem;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<size_t> chosen;
  for (int i = 2; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    if (option == "--mutant") mcshim::g_mutant = std::atoi(argv[i + 1]);
    else if (option == "--call") chosen.push_back(size_t(std::atoi(argv[i + 1])));
    else return std::cerr << "unknown option " << option << "\n", 2;
  }
  std::vector<Call> calls = read_calls(argv[1]);
  if (chosen.empty())
    for (size_t i = 0; i < calls.size(); i++) chosen.push_back(i);
  int bad = 0;
  for (size_t i : chosen) {
    const std::string problem = run(calls.at(i));
    if (!problem.empty()) {
      bad = 1;
      std::cout << calls[i].label << " " << calls[i].launcher << ": " << problem << std::endl;
      if (mcshim::g_mutant > 0) break;
    }
    if (mcshim::g_mutant < 0) {
      std::cout << "reached " << i;
      for (int k = 1; k < mcshim::kMarks; k++)
        if (mcshim::g_reached[k]) std::cout << " " << k;
      std::cout << std::endl;
      std::memset(mcshim::g_reached, 0, sizeof mcshim::g_reached);
    }
  }
  return bad;
}
