// Detects objects with a model of `tools/export.py --with-nms`: ONNX Runtime's C API is all that it needs.
//
//   detect model.onnx detections.json photo.ppm...
//
// The json is in COCO's results format, boxes in the pixels of each image; the images have the ids 1, 2, 3... in their
// order. Images are binary PPM files. This makes one, turned as the photo's EXIF orientation says:
//
//   python -c "from PIL import Image, ImageOps; ImageOps.exif_transpose(Image.open('a.jpg')).convert('RGB').save('a.ppm')"

#include <onnxruntime_c_api.h>

#include <filesystem>
#include <iostream>
#include <memory>
#include <sstream>

#include "image.hpp"

static const OrtApi* ort = nullptr;

template <typename T>
using Handle = std::unique_ptr<T, void(ORT_API_CALL*)(T*)>;

static void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  throw std::runtime_error(message);
}

// Calls a function of the API whose last argument is what it makes.
template <typename T, typename Function, typename... Arguments>
static Handle<T> made(void(ORT_API_CALL* release)(T*), Function function, Arguments... arguments) {
  T* value = nullptr;
  check(function(arguments..., &value));
  return Handle<T>(value, release);
}

// The json in the model's metadata (mgd_det/export/settings.py). It is flat, and quotes in its strings are escaped.
struct Settings {
  std::string json;

  std::string text(const std::string& key) const {
    const size_t place = json.find("\"" + key + "\":");
    if (place == std::string::npos) throw std::runtime_error("the model's settings have no " + key);
    return json.substr(json.find_first_not_of(' ', place + key.size() + 3));
  }
  bool is(const std::string& key, const std::string& value) const { return text(key).rfind('"' + value + '"', 0) == 0; }
  double number(const std::string& key) const { return std::stod(text(key)); }
  std::vector<long long> numbers(const std::string& key) const {
    std::istringstream list(text(key).substr(1));  // after the bracket
    std::vector<long long> found;
    long long value;
    for (char comma = ','; comma == ',' && list >> value; list >> comma) found.push_back(value);
    return found;
  }
};

static Settings read_settings(OrtSession* session, const std::string& model) {
  OrtAllocator* allocator = nullptr;
  check(ort->GetAllocatorWithDefaultOptions(&allocator));
  const auto metadata = made<OrtModelMetadata>(ort->ReleaseModelMetadata, ort->SessionGetModelMetadata, session);
  char* json = nullptr;
  check(ort->ModelMetadataLookupCustomMetadataMap(metadata.get(), allocator, "mgd_det", &json));
  if (json == nullptr) throw std::runtime_error(model + " was not written by tools/export.py");
  Settings settings{json};
  check(ort->AllocatorFree(allocator, json));
  if (settings.number("version") != 1) throw std::runtime_error(model + " has settings of another version than 1");
  if (!settings.is("kind", "whole")) throw std::runtime_error(model + " has no NMS inside: export it with --with-nms");
  return settings;
}

// Writes the objects of an image, each as one entry of COCO's results.
static void detect(OrtSession* session, const Settings& settings, const Image& image, int id, std::ostream& out) {
  const Image input = network_image(image, settings.number("min_size"), settings.number("max_size"));
  const bool bgr = settings.is("channel_order", "BGR");
  const size_t area = size_t(input.height) * input.width;
  std::vector<float> pixels(3 * area);  // the channels one after another
  for (size_t i = 0; i < area; ++i)
    for (int c = 0; c < 3; ++c) pixels[c * area + i] = input.rgb[3 * i + (bgr ? 2 - c : c)];

  OrtMemoryInfo* memory_info = nullptr;
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_info));
  const Handle<OrtMemoryInfo> memory(memory_info, ort->ReleaseMemoryInfo);
  const int64_t shape[] = {3, input.height, input.width};
  const auto tensor = made<OrtValue>(ort->ReleaseValue, ort->CreateTensorWithDataAsOrtValue, memory.get(), pixels.data(),
                                     pixels.size() * sizeof(float), shape, 3, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  const char* const inputs[] = {"image"};
  const char* const outputs[] = {"pred_boxes", "scores", "pred_classes"};
  const OrtValue* const given[] = {tensor.get()};
  OrtValue* values[3] = {nullptr, nullptr, nullptr};
  check(ort->Run(session, nullptr, inputs, given, 1, outputs, 3, values));
  void* data[3];
  std::vector<Handle<OrtValue>> found;
  for (int i = 0; i < 3; ++i) {
    found.emplace_back(values[i], ort->ReleaseValue);
    check(ort->GetTensorMutableData(values[i], &data[i]));
  }
  const auto info = made<OrtTensorTypeAndShapeInfo>(ort->ReleaseTensorTypeAndShapeInfo, ort->GetTensorTypeAndShape,
                                                    static_cast<const OrtValue*>(values[1]));
  size_t number = 0;
  check(ort->GetTensorShapeElementCount(info.get(), &number));

  const float *boxes = static_cast<float*>(data[0]), *scores = static_cast<float*>(data[1]);
  const int64_t* classes = static_cast<int64_t*>(data[2]);
  const std::vector<long long> category_ids = settings.numbers("category_ids");
  const float sizes[] = {float(image.width), float(image.height)};
  const float scales[] = {sizes[0] / input.width, sizes[1] / input.height};
  for (size_t i = 0; i < number; ++i) {
    float box[4];  // x1, y1, x2, y2 in the pixels of the image
    for (int j = 0; j < 4; ++j) box[j] = std::clamp(boxes[4 * i + j] * scales[j % 2], 0.0f, sizes[j % 2]);
    if (box[2] <= box[0] || box[3] <= box[1]) continue;
    out << (out.tellp() > 1 ? ",\n" : "") << "{\"image_id\": " << id
        << ", \"category_id\": " << category_ids.at(size_t(classes[i])) << ", \"score\": " << scores[i] << ", \"bbox\": ["
        << box[0] << ", " << box[1] << ", " << box[2] - box[0] << ", " << box[3] - box[1] << "]}";
  }
}

static void run(const std::string& model, const std::string& json, const std::vector<std::string>& images) {
  ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (ort == nullptr) throw std::runtime_error("the library of ONNX Runtime is older than the headers");
  const auto environment = made<OrtEnv>(ort->ReleaseEnv, ort->CreateEnv, ORT_LOGGING_LEVEL_WARNING, "detect");
  const auto options = made<OrtSessionOptions>(ort->ReleaseSessionOptions, ort->CreateSessionOptions);
  const auto session = made<OrtSession>(ort->ReleaseSession, ort->CreateSession, environment.get(),
                                        std::filesystem::path(model).c_str(), options.get());
  const Settings settings = read_settings(session.get(), model);
  std::ostringstream out;
  out.precision(9);  // enough to tell any two floats apart
  out << "[";
  for (size_t i = 0; i < images.size(); ++i)
    detect(session.get(), settings, read_ppm(images[i]), int(i + 1), out);
  out << "]\n";
  std::ofstream file(json);
  if (!(file << out.str()).flush()) throw std::runtime_error(json + " cannot be written");
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: detect model.onnx detections.json photo.ppm...\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], {argv + 3, argv + argc});
  } catch (const std::exception& e) {
    std::cerr << "error: " << e.what() << "\n";
    return 1;
  }
}
