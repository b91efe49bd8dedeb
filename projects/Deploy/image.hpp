// Images for detect.cpp: binary PPM files, and the size and resizing of mgd_det/export/postprocessing.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

struct Image {
  int height = 0, width = 0;
  std::vector<uint8_t> rgb;  // row by row, three values a pixel
};

// Reads a binary PPM (P6) of 8 bits a channel.
inline Image read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " cannot be read");
  std::string kind;
  int header[3] = {0, 0, 0};  // width, height, largest value
  file >> kind;
  for (int& value : header) {
    while ((file >> std::ws).peek() == '#') file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
    file >> value;
  }
  file.get();  // the one space after the header
  if (!file || kind != "P6" || header[0] < 1 || header[1] < 1 || header[2] != 255)
    throw std::runtime_error(path + " is no binary PPM (P6) of 8 bits a channel");
  Image image{header[1], header[0], {}};
  image.rgb.resize(size_t(3) * image.height * image.width);
  if (!file.read(reinterpret_cast<char*>(image.rgb.data()), std::streamsize(image.rgb.size())))
    throw std::runtime_error(path + " is cut short");
  return image;
}

// Resizes the rows as Pillow's BILINEAR does, which averages where it shrinks, and turns rows into columns.
inline Image resized_and_transposed(const Image& image, int width) {
  Image out{width, image.height, std::vector<uint8_t>(size_t(3) * width * image.height)};
  const double scale = double(image.width) / width, reach = std::max(scale, 1.0);
  for (int x = 0; x < width; ++x) {
    const double center = (x + 0.5) * scale;
    const int first = std::max(int(center - reach + 0.5), 0);
    const int end = std::min(int(center + reach + 0.5), image.width);
    const auto weight = [&](int i) { return std::max(1 - std::abs(i + 0.5 - center) / reach, 0.0); };
    double sum = 0;
    for (int i = first; i < end; ++i) sum += weight(i);
    std::vector<int> weights;  // in units of 2^-22, as Pillow's
    for (int i = first; i < end; ++i) weights.push_back(int(weight(i) / sum * (1 << 22) + 0.5));
    for (int y = 0; y < image.height; ++y)
      for (int c = 0; c < 3; ++c) {
        int value = 1 << 21;  // a half
        for (int i = first; i < end; ++i) value += weights[i - first] * image.rgb[3 * (size_t(y) * image.width + i) + c];
        out.rgb[3 * (size_t(x) * image.height + y) + c] = uint8_t(std::clamp(value >> 22, 0, 255));
      }
  }
  return out;
}

// Returns the image in the size of which the shorter side is min_size, or less if the longer one would exceed max_size.
inline Image network_image(const Image& image, double min_size, double max_size) {
  if (min_size == 0) return image;
  double scale = min_size / std::min(image.height, image.width);
  double height = image.height < image.width ? min_size : scale * image.height;
  double width = image.height < image.width ? scale * image.width : min_size;
  const double longer = std::max(height, width);
  if (longer > max_size) height *= max_size / longer, width *= max_size / longer;
  return resized_and_transposed(resized_and_transposed(image, int(width + 0.5)), int(height + 0.5));
}
